"""Commands that talk to a running server over HTTP: requests, responses, and errors."""
