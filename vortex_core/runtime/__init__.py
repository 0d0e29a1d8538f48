"""A loaded model at work: the engine, its calls, its memory, its captured graphs."""
