"""Commands that talk to a running server over HTTP: what is sent, what comes back, how failures are told."""
