"""From results to the report: summary, gates, recommendation, tables, plots and page."""
