"""What a compiler made of a program: its text read, its time and its collectives added up."""
