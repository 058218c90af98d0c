"""From a network to components without tuning: beginnings, stages, restructuring."""
