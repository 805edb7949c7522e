"""Tables as text, in terminals and in notebooks."""
