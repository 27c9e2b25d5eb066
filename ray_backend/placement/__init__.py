"""From placement constraints to what is asked of Ray: pure functions over `ray.nodes()`."""
