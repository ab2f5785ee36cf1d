"""The page's colours and lines, light and dark: a theme of Gradio's, with nothing fetched from anywhere."""

import gradio as gr


def create_theme() -> gr.themes.Base:
    light_and_dark = {
        "block_border_width": ("1px", "1px"),
        "input_border_width": ("1px", "1px"),
        "button_border_width": ("1px", "1px"),
        "checkbox_label_border_width": ("1px", "1px"),
        "body_background_fill": ("*neutral_50", "*neutral_950"),
        "block_background_fill": ("white", "*neutral_900"),
        "border_color_primary": ("*neutral_200", "*neutral_700"),
        "input_background_fill": ("white", "*neutral_800"),
        "input_border_color": ("*neutral_300", "*neutral_700"),
        "checkbox_border_color": ("*neutral_400", "*neutral_500"),
        "button_secondary_border_color": ("*neutral_300", "*neutral_600"),
        "button_primary_background_fill": ("*primary_600", "*primary_600"),
        "button_primary_background_fill_hover": ("*primary_700", "*primary_500"),
        "block_title_background_fill": ("transparent", "transparent"),
        "block_title_text_color": ("*body_text_color", "*body_text_color"),
        "block_label_background_fill": ("*background_fill_primary", "*background_fill_secondary"),
        "block_label_text_color": ("*body_text_color", "*body_text_color"),
        # The theme's own greys for these are too pale to read.
        "body_text_color_subdued": ("*neutral_500", "*neutral_400"),
        "block_info_text_color": ("*neutral_500", "*neutral_400"),
        "input_placeholder_color": ("*neutral_500", "*neutral_400"),
    }
    values = {name: light for name, (light, _) in light_and_dark.items()}
    values |= {f"{name}_dark": dark for name, (_, dark) in light_and_dark.items()}
    values |= dict.fromkeys(
        ("block_shadow", "input_shadow", "checkbox_label_shadow", "button_secondary_shadow"), "none"
    )
    return gr.themes.Soft(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        radius_size="lg",
        font="Inter ui-sans-serif system-ui -apple-system Roboto sans-serif".split(),  # none fetched
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    ).set(**values, block_title_padding="0")
