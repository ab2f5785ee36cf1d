"""The page's parts; `webui_realtime.py` assembles and serves them. Imports run one way, down this list:

`api` what programs may call through Gradio's own client, and MCP
`live`, `upload`, `composite`, `video` the tabs, one module each; of the live view most is markup and script
`parts` what the tabs share: pictures, prompts, results, the offer to take settings over from a picture
`controls` the settings that all tabs share, and what they say as `EditParams`
`work` one edit for the page: reading, waiting, stopping, saving
`video_edit`, `collage` what is done to videos and to two pictures, without a page
`zero` Spaces that lend a GPU for a call at a time
"""
