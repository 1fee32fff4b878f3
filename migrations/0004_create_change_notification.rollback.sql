DROP FUNCTION IF EXISTS notify_of_notification_preferences();
