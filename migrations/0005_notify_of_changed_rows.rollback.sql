DROP TRIGGER IF EXISTS notify_of_changed_rows ON notification_preferences;
