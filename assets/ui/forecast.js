// What Python foretells, passed on to the composer that asked for it.
watch('value', () => { if (element.isConnected) document.dispatchEvent(new CustomEvent('forecast', { detail: props.value })); });
