"""What Safety-Aware Probing computes: passes, direction, probe, guard, and what comes of a step."""
