"""The FLUX.2 networks over a checkpoint's own weights: transformer, autoencoder, text encoder.

Parameter names are the hub layout's, so a checkpoint loads as it is. Nothing here imports diffusers or transformers.
"""
