"""The swarm services: seats, training sessions, claims, audits and votes of one peer."""
