package virtfleet

import (
	"fmt"
	"io"
	"os"
)

// smallFileLimit is what a context file or a certificate may have, so that a wrong path costs neither memory nor time.
const smallFileLimit = 1 << 20

// readSmall returns what a small file holds.
func readSmall(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	content, err := io.ReadAll(io.LimitReader(file, smallFileLimit+1))
	if err != nil {
		return nil, err
	}
	if len(content) > smallFileLimit {
		return nil, fmt.Errorf("%s: has more than %d MiB", path, smallFileLimit>>20)
	}
	return content, nil
}
