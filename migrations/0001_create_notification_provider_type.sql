-- The type may exist already: from the Go service, or from a run that was killed before yoyo
-- recorded it.
DO $$
BEGIN
    CREATE TYPE notification_provider_type AS ENUM ('Email', 'PushNotification');
EXCEPTION
    WHEN duplicate_object THEN NULL;
END
$$;
