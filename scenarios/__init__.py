"""Ready-to-run scenario files and the catalogues of models, devices and engine presets (data, no logic)."""
