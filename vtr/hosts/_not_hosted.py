"""Model types of transformers that cannot be hosted, and why; asked when no host is found, and printed in docs/models.md."""

NOT_HOSTED = {
    "mllama": "images enter by cross-attention, so that no visual token stands in the sequence",
    "florence2": "an encoder reads image and text before a decoder answers, so that no cache holds visual tokens alone",
    "deepseek_ocr2": "its tower writes learned query tokens, which stand for no patch",
    "blip_2": "its Q-Former writes a fixed number of learned tokens, which stand for no patch",
    "instructblip": "its Q-Former writes a fixed number of learned tokens, which stand for no patch",
    "llama4": "most layers attend in chunks of positions, which a removal would move",
    "gemma3n": "every layer mixes streams and embeddings of its own (AltUp, LAuReL), and its tower is a MobileNet without patches",
    "paligemma": "the whole prompt sees itself in both directions, which is followed for images (Gemma 3 and 4) only",
}
"""Model type -> reason."""
