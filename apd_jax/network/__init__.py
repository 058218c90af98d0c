"""All that is known of a network: its function, parameters and data."""
