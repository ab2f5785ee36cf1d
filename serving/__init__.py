"""The HTTP side and the start-up, one module for each thing that it does.

`startup` flags, the choice of the model and its loading; `access` who may come in, and how a request is refused;
`endpoint` what is the same for every route; `models` requests, answers and their checks; `json_bounds` what a JSON text
may cost; `holder` the engine, or how far its loading has come; `decoding` pictures from outside, opened at a bounded
price, with `inspection` of what that is and `decode_worker`, the process that does it; `edit` POST /edit; `live` the
socket; `status` /health, /ready and /metrics; `document` /openapi.json and /docs; `door` what the page's own routes are
asked first; `guesses` wrong logins; `connections` and `proxy` how requests reach the process; `farewell` how it ends.
"""
