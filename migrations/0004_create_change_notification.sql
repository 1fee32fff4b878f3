-- A provider that moves to another channel notifies for both channels. PostgreSQL delivers equal
-- notifications of one transaction once.
CREATE OR REPLACE FUNCTION notify_of_notification_preferences() RETURNS trigger
SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify('notification_preferences', provider_type::text)
           FROM unnest(enum_range(NULL::notification_provider_type)) AS provider_type;
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        PERFORM pg_notify('notification_preferences', OLD.provider_type::text);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM pg_notify('notification_preferences', NEW.provider_type::text);
    END IF;
    RETURN NULL;
END
$$ LANGUAGE plpgsql;
