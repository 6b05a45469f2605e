"""The independent reference simulator, its outside golden numbers and its law tests. Never shipped."""
