"""Call shapes of other libraries, for code that moves."""
