"""Other libraries' models: their files as our parameters, and ours as theirs."""
