"""Operations on finished runs and caches: merge, convert, check, show. No Dask."""
