"""What a frame of a session costs and keeps: settings, one frame in three stages, policies and pace."""
