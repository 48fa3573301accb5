//go:build !unix

package virtfleet

import "os"

func inodeOf(os.FileInfo) any { return nil }
