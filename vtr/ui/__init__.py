"""The page of `vtr ui`: what a model answers with all and with few visual tokens, and what became of every token.

`session.py` asks the model, `media.py` opens what was uploaded, `steps.py` notes what every step of a plan did and puts tokens back,
`explain.py`, `pictures.py` and `reproduce.py` say and show it: all of them work without gradio. `page.py` is the page, `serve.py` starts it.
"""
