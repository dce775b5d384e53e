"""MGM-2B (Mini-Gemini on Gemma): model, two-stage training, and evaluation.

Runs alone: it needs torch and configuration files, and knows nothing of `synth_agent`.
"""
