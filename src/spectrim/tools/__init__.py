"""General tools that do not depend on compression."""
