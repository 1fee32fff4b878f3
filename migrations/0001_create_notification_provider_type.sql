-- The type may be there: from the Go service, or from a run that was killed before it was marked.
DO $$
BEGIN
    CREATE TYPE notification_provider_type AS ENUM ('Email', 'PushNotification');
EXCEPTION
    WHEN duplicate_object THEN NULL;
END
$$;
