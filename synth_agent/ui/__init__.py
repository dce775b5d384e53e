"""The Textual app: screens, widgets, one stylesheet, no logic. See `synth_agent.ui.app`."""
