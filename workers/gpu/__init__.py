"""What a worker does differently on a GPU. Imported only where there is one."""
