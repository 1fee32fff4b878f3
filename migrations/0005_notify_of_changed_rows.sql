CREATE OR REPLACE TRIGGER notify_of_changed_rows
    AFTER INSERT OR UPDATE OR DELETE ON notification_preferences
    FOR EACH ROW EXECUTE FUNCTION notify_of_notification_preferences();
