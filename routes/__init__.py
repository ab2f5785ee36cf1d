"""What `server.py` puts together: one module for each thing that the HTTP side does.

`access` who may come in, and the frame round every route; `holder` the engine or how far its loading is; `edit`
POST /edit; `live` the socket; `status` /health, /ready and /metrics; `document` /openapi.json and /docs.
"""
