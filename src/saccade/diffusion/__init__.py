"""Methods for generators that denoise: what their attention is made to do, step by step."""
