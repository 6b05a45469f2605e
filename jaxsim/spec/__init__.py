"""What a user describes: models, devices, plans, engines, scenarios; all checked here."""
