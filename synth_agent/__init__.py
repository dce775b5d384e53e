"""synth-agent: data-synthesis experiments for multimodal LLMs, with an honest lab notebook."""

__version__ = "0.1.0"
