"""The HTTP side and the start-up, one module for each thing that it does.

`startup` flags, the choice of the model and its loading; `access` who may come in, and the frame around every route;
`holder` the engine, or how far its loading has come; `decoding` pictures from outside, opened at a bounded price, with
`inspection` of what that is and `decode_worker`, the process that does it; `edit` POST /edit; `live` the socket; `status` /health, /ready and
/metrics; `document` /openapi.json and /docs.
"""
