"""Who decides which components are active."""
