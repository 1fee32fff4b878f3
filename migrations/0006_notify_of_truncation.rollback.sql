DROP TRIGGER IF EXISTS notify_of_truncation ON notification_preferences;
