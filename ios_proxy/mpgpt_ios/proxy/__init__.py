"""The rank's end of the connection to an iPad."""
