"""Whether the hosts of a hostfile can form a ring, before anybody starts one."""
