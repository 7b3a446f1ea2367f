"""What a run would take: work counted from settings, a PM's shape and the lengths of pairs, and rates of a device."""
