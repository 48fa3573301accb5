package virtfleet

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAFileWithoutEndIsNotRead(t *testing.T) {
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(big, 1<<30); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{big, "/dev/zero"} {
		if _, err := ReadContexts(path); err == nil || !strings.HasSuffix(err.Error(), path+": has more than 1 MiB") {
			t.Error(err)
		}
		files := Credentials{CAFile: path, CertFile: path, KeyFile: path}
		if _, err := Dial(t.Context(), WithAddress("localhost:1"), WithCredentials(files)); err == nil ||
			!strings.Contains(err.Error(), "has more than 1 MiB") {
			t.Error(err)
		}
	}
}
