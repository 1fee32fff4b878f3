DROP TYPE IF EXISTS notification_provider_type;
