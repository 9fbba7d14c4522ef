"""What is done with models besides generating: compare, measure, inspect, work through batches of prompts."""
