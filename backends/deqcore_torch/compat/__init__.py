"""The call signatures of other libraries, for code that migrates to deqcore."""
