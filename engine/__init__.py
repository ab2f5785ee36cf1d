"""The engine's trades: sessions, the inference thread, one frame in three stages, policies, pace and settings.

`qwen_realtime.RealtimeEngine` is the door.
"""
