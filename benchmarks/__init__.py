"""Speed, memory and quality, measured beside each other."""
