"""What is done on a canvas besides writing from left to right: holes filled, regions rewritten, questions read."""
