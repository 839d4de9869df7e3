"""mpgpt_ios: an iPad as a rank of mpgpt's ring."""
