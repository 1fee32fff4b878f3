CREATE OR REPLACE TRIGGER notify_of_truncation
    AFTER TRUNCATE ON notification_preferences
    FOR EACH STATEMENT EXECUTE FUNCTION notify_of_notification_preferences();
